"""What is built with the reference. Whatever runs here first sets what torch reads when it is imported."""

from command import machine

machine.let_threads_sleep()
