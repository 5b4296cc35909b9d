"""One routed network across nodes: who has which part of it, and the tunnel that leads to the others' parts."""
