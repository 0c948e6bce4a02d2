"""What libraries say that concerns nobody here."""

import logging

_TALKATIVE = ("lm_eval", "bitsandbytes", "torchao", "transformers", "torch.utils._pytree")


def quiet() -> None:
    """Keep the libraries' warnings out of the progress: they concern options set here on purpose."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
