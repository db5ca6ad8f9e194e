#!/usr/bin/env bash
# Three machines inside this one, for `ray up`: laptop, head and w1, each with a disk, a home, a network card, processes
# and an sshd of its own. Wants root, iproute2, openssh and rsync.
#
# All of them live in a room, the namespaces of this process, and end with it, however it ends; nothing that they
# write, mount or listen on is seen outside. So two of these do not meet, though names and addresses are the same.
#
#     tests/hosts.sh PATH...    # what of this machine each of them sees, read-only; it takes commands from stdin:
#     boot NAME                 # its disk is as it was left; "NAME is up" when its sshd answers
#     kill NAME                 # power loss: no process gets a signal
#     NAME COMMAND              # in a login shell, by ssh
#
# In the environment: UV_CACHE_DIR is seen by each as if it were its own, and what it writes there stays with it; uv's
# indexes are named to each, since what is cached is found by them.
set -euo pipefail
if [ $$ != 1 ]; then
    exec unshare --mount --net --pid --fork --kill-child --mount-proc bash "$0" "$@"
fi

declare -A address=([laptop]=10.77.0.1 [head]=10.77.0.2 [w1]=10.77.0.3) pid=()
seen=("$@")
site=(UV_CACHE_DIR UV_DEFAULT_INDEX UV_INDEX UV_INDEX_URL UV_EXTRA_INDEX_URL UV_FIND_LINKS)
home=/home/researcher
# On a disk in memory: an overlay may not lie on another, as the root of a container is.
mount -t tmpfs -o size=6g,mode=755 tmpfs /run
mkdir /run/{netns,bytecode}
# Bytecode that was compiled here is valid there, too: the modules are the same files.
project=$(cd "$(dirname "$0")/.." && pwd)
compiled() { # FOLDER NAME [TEST...]: all below a folder, by the name that it has there; tests as of `find`
    [ -d "$1" ] || return 0
    mkdir -p "/run/bytecode$2"
    # tar ends with 1 if a file changes meanwhile, which another test may have compiled.
    (cd "$1" && find . -path '*/__pycache__/*.pyc' ! -path '*/test*/*' "${@:3}" -print0 |
        { tar -c --null -T - --transform 's,__pycache__/,,' || [ $? = 1 ]; }) | tar -x -C "/run/bytecode$2"
}
for libraries in "$project"/.venv/lib/python3*; do
    compiled "$libraries" "$home/fedsim/.venv/lib/${libraries##*/}"
done
for path in "${seen[@]}"; do
    for libraries in "$path"/lib/python3*; do compiled "$libraries" "$libraries" ! -path '*/site-packages/*'; done
done
for key in user host; do ssh-keygen -q -t ed25519 -N '' -f "/run/$key-key"; done
ip link set lo up
ip link add switch type bridge
ip addr add 10.77.0.254/24 dev switch
ip link set switch up

boot() { # NAME
    local name=$1 disk=/run/$1
    if [ ! -d "$disk" ]; then
        mkdir -p "$disk"/{root,new,cache}
        ip netns add "$name"
        ip -n "$name" link set lo up
        ip link add "to-$name" type veth peer name eth0 netns "$name"
        ip link set "to-$name" master switch
        ip -n "$name" addr add "${address[$name]}/24" dev eth0
        ip -n "$name" link set eth0 up
        ip -n "$name" route add default via 10.77.0.254 # Ray learns its own address from where a packet would leave
    fi
    rm -rf "$disk"/work{,-cache}
    mkdir "$disk"/work{,-cache}
    ip link set "to-$name" up
    local known
    known=$(declare -p home disk name address seen site "${site[@]}" 2> /dev/null || true; declare -f machine)
    ip netns exec "$name" env -i PATH="$PATH" LANG=C.UTF-8 unshare --mount --pid --uts --ipc --fork --kill-child \
        bash -euo pipefail -c "$known; machine" < /dev/null > "$disk/log" 2>&1 &
    pid[$name]=$!
    disown # or the shell tells of its end
    for _ in {1..100}; do
        if enter "$name" true 2> /dev/null; then
            echo "$name is up"
            return
        fi
        sleep 0.1
    done
    cat "$disk/log" >&2
    return 1
}

machine() { # in its namespaces; becomes its sshd
    cd "$disk/root"
    mount -t overlay -o "lowerdir=/,upperdir=$disk/new,workdir=$disk/work" overlay .
    cd "$disk/root" # the same folder was below the mount
    mount --rbind /dev dev
    mount --rbind /sys sys
    mount -t proc proc proc
    mount -t tmpfs tmpfs run
    # Ray's folders, and files of uv's and ssh's, must not be those of this machine: memory and temporary ones.
    for folder in dev/shm tmp; do mount -t tmpfs -o mode=1777 tmpfs "$folder"; done
    mkdir -p run/sshd ".$home/.ssh" etc/profile.d
    for path in "${seen[@]}"; do
        if [ -d "$path" ]; then
            mkdir -p ".$path"
        elif [ ! -e ".$path" ]; then
            mkdir -p "$(dirname ".$path")"
            touch ".$path"
        fi
        mount --bind -o ro "$path" ".$path"
    done
    # What a site says where machines share a cache and reach no index. Python compiles any other module once, for all
    # machines.
    mkdir -p var/bytecode
    mount --bind /run/bytecode var/bytecode
    echo 'export PYTHONPYCACHEPREFIX=/var/bytecode UV_OFFLINE=1 UV_LINK_MODE=symlink' > etc/profile.d/site.sh
    for variable in "${site[@]}"; do
        if [ -n "${!variable:-}" ]; then printf 'export %s=%q\n' "$variable" "${!variable}" >> etc/profile.d/site.sh; fi
    done
    for path in "${seen[@]}"; do
        if [ -d "$path" ]; then path+=/bin; else path=$(dirname "$path"); fi
        echo "export PATH=$path:\$PATH" >> etc/profile.d/site.sh
    done
    if [ -n "${UV_CACHE_DIR:-}" ]; then
        mkdir -p ".$UV_CACHE_DIR"
        local layers="lowerdir=$UV_CACHE_DIR,upperdir=$disk/cache,workdir=$disk/work-cache"
        mount -t overlay -o "$layers" overlay ".$UV_CACHE_DIR"
    fi
    sed -i "s|^\(root:[^:]*:[^:]*:[^:]*:[^:]*\):.*|\1:$home:/bin/bash|" etc/passwd # an empty home, not this machine's
    chmod 700 ".$home" ".$home/.ssh"
    cp /run/user-key.pub ".$home/.ssh/authorized_keys"
    if [ "$name" = laptop ]; then install -m 600 /run/user-key ".$home/.ssh/id_ed25519"; fi
    install -m 600 /run/host-key etc/ssh/room_key
    hostname "$name"
    for other in "${!address[@]}"; do echo "${address[$other]} $other"; done > etc/hosts
    echo "127.0.0.1 localhost" >> etc/hosts
    rm -f etc/resolv.conf # an unknown host name then fails at once
    exec chroot . /usr/sbin/sshd -D -e -f /dev/null -h /etc/ssh/room_key \
        -o UsePAM=no -o PermitRootLogin=prohibit-password -o PidFile=none -o MaxStartups=100
}

kill_() { # NAME
    ip link set "to-$1" down # first: a process that is killed would still say goodbye
    local init
    init=$(pgrep -P "${pid[$1]}")
    kill -9 "${pid[$1]}"
    while [ -d "/proc/$init" ]; do sleep 0.05; done
    echo "$1 is down"
}

enter() { # NAME COMMAND
    ssh -q -i /run/user-key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o ConnectTimeout=2 \
        "root@${address[$1]}" -- bash --login -c "$(printf %q "${*:2}")" < /dev/null
}

while read -r word rest; do
    case $word in
        boot) boot "$rest" ;;
        kill) kill_ "$rest" ;;
        laptop | head | w1) enter "$word" "$rest" || echo "exit code $?" ;;
        *) echo "boot NAME, kill NAME or NAME COMMAND, not: $word" ;;
    esac
done
