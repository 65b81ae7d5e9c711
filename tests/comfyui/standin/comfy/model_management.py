"""One device, memory without end, and nobody who presses Cancel."""

import torch

current_loaded_models = []


def get_torch_device():
    return torch.device("cpu")


def unet_manual_cast(weight_dtype, inference_device, supported_dtypes=(torch.float16, torch.bfloat16, torch.float32)):
    return torch.float32


def module_size(module):
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def load_models_gpu(
    models, memory_required=0, force_patch_weights=False, minimum_memory_required=None, force_full_load=False
):
    """Clones share one network: the one that was loaded before with other patches is unloaded first."""
    for patcher in models:
        if patcher.model.current_weight_patches_uuid == patcher.patches_uuid:
            continue
        for other in [other for other in current_loaded_models if other.model is patcher.model]:
            other.unpatch_model(get_torch_device())
            current_loaded_models.remove(other)
        patcher.load(get_torch_device(), full_load=True)
        current_loaded_models.append(patcher)


def unload_all_models():
    while current_loaded_models:
        current_loaded_models.pop().detach()


def processing_interrupted():
    return False


def throw_exception_if_processing_interrupted():
    pass
