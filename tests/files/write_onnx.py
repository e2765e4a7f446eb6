"""Writes tests/files/data/exported.onnx: a small network, exported by torch.onnx.export.

    python tests/files/write_onnx.py [FOLDER]    # torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2

`data/exported.safetensors` contains the weights of the network.
"""

import sys
from pathlib import Path

import onnx
import torch
from safetensors.torch import save_file
from torch import Tensor, nn


class Net(nn.Module):
    """One layer of each kind that contains a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.lift = nn.Linear(4, 6)  # an input with three axes, which becomes MatMul
        self.conv = nn.Conv1d(6, 4, 3, padding=1, groups=2)
        self.depthwise = nn.Conv1d(4, 4, 3, padding=1, groups=4)
        self.merged = nn.Conv1d(4, 5, 1)
        self.norm = nn.BatchNorm1d(5)
        self.up = nn.ConvTranspose1d(5, 3, 2, stride=2)
        self.lstm = nn.LSTM(3, 4, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(8, 3, batch_first=True)
        self.head = nn.Linear(3, 5)  # an input with two axes, which becomes Gemm

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.depthwise(self.conv(self.lift(self.words(tokens)).mT))
        x = self.up(self.norm(self.merged(x)).relu()).mT
        x, _ = self.gru(self.lstm(x)[0])
        return self.head(x[:, -1])


def write(folder: Path) -> None:
    """Updates the statistics of BatchNorm, exports, and removes descriptions of the program."""
    torch.manual_seed(0)
    net = Net()
    for _ in range(20):
        net(torch.randint(7, (16, 4)))
    tokens = torch.randint(7, (2, 4))
    program = torch.onnx.export(net.eval(), (tokens,))
    model = program.model_proto
    for one in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        one.ClearField("metadata_props")
    model.graph.ClearField("value_info")
    onnx.save(model, folder / "exported.onnx")
    state = net.state_dict()
    weights = {name: state[name] for name in state if "norm" not in name and state[name].ndim > 1}
    save_file(weights, folder / "exported.safetensors")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("data"))
