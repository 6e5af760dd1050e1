"""kpo: reinforcement learning of language models with verifiable rewards."""
