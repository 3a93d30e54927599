"""What magicmix.py needs besides the algorithm: its options, the files it reads and writes, the machine it runs on."""
