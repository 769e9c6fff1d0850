"""What every adapter shares: the contract and the wire."""
