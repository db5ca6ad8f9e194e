"""What a client does in a round: it trains, alone or in a stack of clients, and it is evaluated."""
