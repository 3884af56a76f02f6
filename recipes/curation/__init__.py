"""Stage 2's data from pictures: the stage-1 model describes, a language model mends, rules filter, people pick."""
