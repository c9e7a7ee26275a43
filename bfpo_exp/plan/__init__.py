"""What a run will cost, worked out from its config alone: no data, weights, hub or tracker is touched."""
