"""How a pretrained encoder is judged: findings without training, retrieval, a pixel baseline, a picture."""
