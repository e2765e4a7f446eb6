"""Train under FSDP2 with κ of every weight at most 10: torchrun --nproc-per-node 2 fsdp2.py"""

import gc
import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import wellcond as wc


def main(device):
    rank, world = dist.get_rank(), dist.get_world_size()
    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32, device=device)
    labels = torch.tensor(digits.target, device=device)

    torch.manual_seed(0)  # the same weights on every process
    model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.Tanh(), torch.nn.Linear(48, 10))
    model.to(device)
    fully_shard(model[0])
    fully_shard(model)

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    reg = wc.Regularizer(model, wc.ConditionLimit(10))
    reg.attach(optimizer)

    def epoch():
        for batch in torch.arange(len(images), device=device).split(32 * world):
            mine = batch[rank::world]
            if len(batch) < world:
                continue
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[mine]), labels[mine]).backward()
            optimizer.step()

    epoch()
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "reg": reg}
    dcp.save(state, checkpoint_id="one")
    epoch()
    dcp.load(state, checkpoint_id="one")  # back to the end of the first epoch
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    epoch()
    reg.enforce()  # on all processes, before the weights are used

    weight = model[0].weight.full_tensor()  # only to measure it; training gathers nothing
    if rank == 0:
        print(reg)
        assert wc.condition_number(weight) <= 10


# Without torchrun, the group has one process.
alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}
for name, value in alone.items():
    os.environ.setdefault(name, value)
on_gpu = torch.cuda.is_available()
if on_gpu:
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
dist.init_process_group("nccl" if on_gpu else "gloo")
main("cuda" if on_gpu else "cpu")
dist.barrier()
gc.collect()  # objects that still refer to the group would make gloo abort at exit
dist.destroy_process_group()
