"""How a pretrained encoder is judged: zero-shot findings, retrieval, a pixel baseline and a picture of what it looks at."""
