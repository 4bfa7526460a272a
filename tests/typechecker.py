"""The checker that the addopts of pyproject.toml put on every annotation of ours."""

from beartype import BeartypeConf, beartype

# An int is a float to every type checker (PEP 484): `scale: float` takes 1.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
