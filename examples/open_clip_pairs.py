"""The loss of CLIP in a loop with open_clip's model, without the matrix of logits.

python examples/open_clip_pairs.py
"""

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

from seer_kernels.integrations.open_clip import ClipLoss

torch.manual_seed(0)
picture = CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=16)
caption = CLIPTextCfg(context_length=8, vocab_size=32, width=32, heads=2, layers=1)
model = CLIP(16, picture, caption)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loss_of = ClipLoss()  # as open_clip.loss.ClipLoss; with several processes its rank, world_size and gather_with_grad
pictures, captions = torch.randn(16, 3, 16, 16), torch.randint(1, 31, (16, 8))

for step in range(20):
    chosen = torch.randperm(16)[:8]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images, texts, scale = model(pictures[chosen], captions[chosen])
        loss = loss_of(images, texts, scale)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        model.logit_scale.clamp_(0, torch.log(torch.tensor(100.0)))  # as open_clip does
    if step % 5 == 4:
        print(f"step {step + 1}: loss {loss:.3f}")
