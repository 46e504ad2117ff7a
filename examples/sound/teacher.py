"""The teacher: a network of one's own, its process, what it predicts, and its data."""

from network import SoundNet
from safetensors.torch import load_file
from sounds import FOLDER, varied

from teachers import Linear, Network, Pixels, Teacher


def teacher() -> Teacher:
    network = SoundNet()
    network.load_state_dict(load_file(FOLDER / "teacher.safetensors"))
    codec = Pixels(classes=4, null=4)  # data are what the network sees; label 4 means none
    return Teacher(Network(network, Linear(), "flow"), codec, shape=(1, 2048))


def data():
    """Sounds (8192, 1, 2048) and labels (8192,)."""
    return varied(8192, seed=0)
