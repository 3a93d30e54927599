"""What magicmix.py needs besides the algorithm: its options, pictures and noise in files, and the machine it runs on."""
