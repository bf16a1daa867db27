// What a key is to a query, decided from small integers. The CPU kernels use SIMD vectors as Mask, the CUDA kernels
// integers; a mask is all ones or all zeros. No include guard: it is compiled once for each target, in its namespace.

template <class Mask>
struct PairClass {
  Mask positive;
  Mask negative;
};

// own: the key is the query's own pair; same: they share a label; exists: the key takes part at all.
template <class Mask>
SEER_DEVICE inline PairClass<Mask> classify(Mask own, Mask same, Mask exists, SameLabel rule) {
  Mask positive = own;
  Mask negative = ~own;
  if (rule == SameLabel::kPositive) positive |= same;
  if (rule != SameLabel::kNegative) negative &= ~same;
  return {positive & exists, negative & exists};
}
