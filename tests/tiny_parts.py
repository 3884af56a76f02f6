"""Configurations of tiny frozen parts, which tests build models of."""

IMAGE_SIZE = 28  # pixels of a picture's side; patches of 14, so 4 and a CLS token
NUM_QUERIES = 4  # image tokens of a picture with the Q-Former
VOCAB_SIZE = 300

# Weights larger than usual, so that a tiny random model reacts to everything it is given.
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": IMAGE_SIZE, "patch_size": 14, "initializer_range": 0.3,
}  # fmt: skip
QFORMER = {
    "vocab_size": 8, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "cross_attention_frequency": 2, "max_position_embeddings": 8, "encoder_hidden_size": 16, "initializer_range": 0.3,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": VOCAB_SIZE, "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256,
    "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
