"""A cluster of any size, simulated: the product's scheduler, block accounts, hand-over and
placement, with the engine's arithmetic replaced by the times that it takes."""
