"""`burst-jax demo`: a run on real text over simulated devices, and the other ways to do it.

config.py       what can be asked of it
training.py     the same short run on many devices and on one
comparison.py   attention layers that communicate differently: bytes, memory, time, error
verdict.py      the claims, and whether they hold
figure.py       the picture
page.py         one HTML file with everything
show.py         all of it, in order
"""
