// Browsers start no worker from a file:// page, and the site's search is one: there, it runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.frame.srcdoc =
        "<script>" +
        "self.postMessage = data => parent.postMessage(data, '*');" +
        "self.importScripts = (...urls) => Promise.all(urls.map(url => new Promise((done, failed) => {" +
        "  const script = Object.assign(document.createElement('script'), {src: url, onload: done, onerror: failed});" +
        "  document.head.append(script)" +
        "})))" +
        `<\/script><script src="${url}"><\/script>`
      this.frame.onload = () => {
        this.ready = true
        this.waiting.splice(0).forEach(data => this.postMessage(data))
      }
      this.onReply = event => {
        if (event.source !== this.frame.contentWindow) return
        const reply = new MessageEvent("message", {data: event.data})
        this.dispatchEvent(reply)
        this.onmessage?.(reply)
      }
      window.addEventListener("message", this.onReply)
      document.body.append(this.frame)
    }
    postMessage(data) {
      // Its own postMessage is replaced.
      if (this.ready) this.frame.contentWindow.dispatchEvent(new MessageEvent("message", {data}))
      else this.waiting.push(data)
    }
    terminate() {
      window.removeEventListener("message", this.onReply)
      this.frame.remove()
    }
  }
}
