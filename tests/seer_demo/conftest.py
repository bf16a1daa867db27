"""One thread, also for the processes that tests start: on problems this small threads mostly wait for each other."""

import os

import torch

os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
