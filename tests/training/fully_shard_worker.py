"""Trains a tiny LION with each parameter sharded over the processes (PyTorch's fully_shard, FSDP2); run by torchrun.

The argument: float32, where all forms are compared with one process; or bfloat16, for computing only and for all."""

import os
import sys
import tempfile

import torch
import torch.distributed as dist
from safetensors.torch import save_model
from small_models import FORMS, VARIANTS, text_config
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import lion_hf


COMPUTE = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def made(mask_type: str, form: str, half: bool) -> lion_hf.LionForMaskedLM:
    """A model of seed 0; `half`: loaded in bfloat16, gates included, as FSDP2 requires one dtype for all parameters."""
    torch.manual_seed(0)
    model = lion_hf.LionForMaskedLM(text_config(mask_type, format=form, hidden_dropout_prob=0.0))
    if not half:
        return model
    with tempfile.TemporaryDirectory() as folder:  # one for each process, all of which write
        model.config.save_pretrained(folder)
        save_model(model, f"{folder}/model.safetensors", metadata={"format": "pt"})
        return type(model).from_pretrained(folder, dtype=torch.bfloat16).to(torch.bfloat16)


def train(mask_type: str, form: str, rank: int, world: int, half: bool = False, policy: MixedPrecisionPolicy = None):
    """The weights after three steps, by name."""
    model = made(mask_type, form, half).train()
    if world > 1:
        options = {"mesh": init_device_mesh("cpu", (world,)), "mp_policy": policy or MixedPrecisionPolicy()}
        for layer in model.base_model.layers:
            fully_shard(layer, **options)
        fully_shard(model, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = torch.randint(model.config.vocab_size, (3, 8, 21), generator=torch.Generator().manual_seed(1))
    for ids in data:
        mine = ids[rank::world].contiguous()
        loss = model(input_ids=mine, labels=mine, num_items_in_batch=ids.numel()).loss
        (loss * world).backward()  # gradients are averaged
        optimizer.step()
        optimizer.zero_grad()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def compare_float32(rank: int, world: int) -> None:
    for mask_type in VARIANTS:
        for form in FORMS:
            sharded = train(mask_type, form, rank, world)
            if rank == 0:  # which alone gets the whole weights
                for name, weight in train(mask_type, form, 0, 1).items():
                    torch.testing.assert_close(
                        sharded[name], weight, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
                    )
                sys.stdout.write(f"{mask_type} {form} equal\n")


def compare_bfloat16(rank: int, world: int) -> None:
    for mask_type in VARIANTS:
        whole = train(mask_type, "chunk", 0, 1)
        for name, options in {"loaded in": {"half": True}, "computed in": {"policy": COMPUTE}}.items():
            sharded = train(mask_type, "chunk", rank, world, **options)
            if rank == 0:
                stored = torch.bfloat16 if name == "loaded in" else torch.float32
                assert {weight.dtype for weight in sharded.values()} == {stored}
                difference = torch.cat([(weight - sharded[key]).flatten() for key, weight in whole.items()])
                assert difference.norm() < 0.1 * torch.cat([weight.flatten() for weight in whole.values()]).norm()
                sys.stdout.write(f"{mask_type} {name} bfloat16: near\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    compare = {"float32": compare_float32, "bfloat16": compare_bfloat16}[sys.argv[1]]
    compare(dist.get_rank(), dist.get_world_size())
    dist.barrier()  # a process that leaves early takes its connections from the other
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # the interpreter's own end can meet threads of gloo that are still running, and abort
