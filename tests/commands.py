"""Commands as a person types them: what they say where they fail, and the pictures that they leave."""

import numpy as np
import pytest
from PIL import Image

from hf_ddpm.cli import main


def refused(capfd, *words, code=2):
    """The one line on stderr of a command that has to fail."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    out, err = capfd.readouterr()
    assert stop.value.code == code, err
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err
    return err.rstrip("\n")


def pixels(folder):
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in folder.glob("*.png")}


def same_images(one, other):
    """Equal up to one grey level: a network's last bits may depend on the batch."""
    return one.keys() == other.keys() and all(np.abs(one[name] - other[name]).max() <= 1 for name in one)


def sample(model, out, *flags):
    main(["sample", str(model), "--out", str(out), *(str(flag) for flag in flags)])
    return pixels(out)
