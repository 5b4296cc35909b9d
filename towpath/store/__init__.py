"""Tables: one contract, several backends."""
