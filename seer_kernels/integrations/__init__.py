"""The kernels behind the call signatures of other packages, one module for each.

Nothing here is imported by `import seer_kernels`. A module that builds on its host package imports it, and says what to
install where it is absent: `from seer_kernels.integrations.sentence_transformers import MultipleNegativesRankingLoss`.
Each takes what the original takes and gives its values and gradients; what it cannot give it refuses.
"""
