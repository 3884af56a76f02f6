"""How good a model is: the paper's variants in miniature, compared with the paper."""
