"""Stands in for ComfyUI's register of model folders."""

import os
import tempfile

folder_names_and_paths = {"diffusion_models": ([], {".safetensors"}), "text_encoders": ([], {".safetensors"})}


def get_folder_paths(folder_name):
    return folder_names_and_paths[folder_name][0][:]


def get_filename_list(folder_name):
    folders, extensions = folder_names_and_paths[folder_name]
    found = {name for folder in folders for name in os.listdir(folder)}
    return sorted(name for name in found if os.path.splitext(name)[1] in extensions)


def get_full_path_or_raise(folder_name, filename):
    for folder in get_folder_paths(folder_name):
        path = os.path.join(folder, filename)
        if os.path.isfile(path):
            return path
    raise FileNotFoundError(f"Model in folder '{folder_name}' with filename '{filename}' not found.")


def get_output_directory():
    return tempfile.gettempdir()
