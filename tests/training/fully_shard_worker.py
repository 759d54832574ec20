"""Trains a tiny LION with each parameter sharded over the processes (PyTorch's fully_shard); run by torchrun."""

import os
import sys

import torch
import torch.distributed as dist
from small_models import text_config
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lion_hf


def train(mask_type: str, form: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = lion_hf.LionForMaskedLM(text_config(mask_type, format=form, hidden_dropout_prob=0.0))
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for layer in model.base_model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = torch.randint(model.config.vocab_size, (3, 8, 21), generator=torch.Generator().manual_seed(1))
    for ids in data:
        mine = ids[rank::world].contiguous()
        loss = model(input_ids=mine, labels=mine, num_items_in_batch=ids.numel()).loss
        (loss * world).backward()  # gradients are averaged
        optimizer.step()
        optimizer.zero_grad()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for mask_type in ("lit", "decay", "selective"):
        for form in ("attention", "chunk", "rnn"):
            sharded = train(mask_type, form, rank, world)
            if rank == 0:
                for name, weight in train(mask_type, form, 0, 1).items():
                    torch.testing.assert_close(
                        sharded[name], weight, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
                    )
                sys.stdout.write(f"{mask_type} {form} equal\n")
    dist.barrier()  # a process that leaves early takes its connections from the other
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # the interpreter's own end can meet threads of gloo that are still running, and abort
