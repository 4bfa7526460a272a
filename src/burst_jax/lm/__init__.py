"""A byte-level language model on `burst_jax`, and its training on your own files.

    config.py, config_file.py   what a run is, and TOML files that say it
    data.py                     files as one stream of tokens, cut into windows
    model.py, loss.py           the decoder, and the mean loss over all devices
    train.py                    the compiled step and the loop
    run.py                      a whole run, shown and written:
    progress.py, console.py     what a person sees
    metrics.py                  JSON lines

Import from these modules; this one imports nothing, so that reading a config loads no Flax.
"""
