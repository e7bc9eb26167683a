"""One short eager run that records what every layer really passes to attention, and what its mask really computes."""
