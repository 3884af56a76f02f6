"""`minigpt4 ablate`: the paper's ablations in miniature, and a report that compares them with the paper."""
