// The table "ref": names every oracle kernel once.
#include "kernels/ref/ref.h"

namespace narrows::kernels::ref {

const Ops kTable = {
    .name = "ref",
    .f32_to_f16 = f32_to_f16,
    .f16_to_f32 = f16_to_f32,
    .gemm = gemm,
    .gemm_f16 = gemm_f16,
    .pack_bf16 = pack_bf16,
    .gemm_bf16 = gemm_bf16,
    .rope_rows = rope_rows,
    .rope_tile = rope_tile,
    .attend_f32 = attend_f32,
    .attend_f16 = attend_f16,
    .prefill = {&kPrefillF32, &kPrefillBf16, &kPrefillBf16Shift, &kPrefillFp16, &kPrefillPasa,
                &kPrefillFp16Shift},
    .best_prefill = PrefillKind::f32,
    .native_half = false,
    .dequant_groups = dequant_groups,
    .quant_groups = quant_groups,
    .select_top = select_top,
    .quant_latents = quant_latents,
    .unpack_planes = unpack_planes,
    .expand_index = expand_index,
    .score_index = score_index,
    .fold_query = fold_query,
    .pool_candidates = pool_candidates,
    .count_above = count_above,
    .keep_above = keep_above,
    .amplitudes = amplitudes,
    .read_index = read_index,
    .sum_planes = sum_planes,
    .score_rows_f16 = score_rows_f16,
    .softmax_scores = softmax_scores,
    .softmax_part = softmax_part,
    .round_rows = round_rows,
    .packed_product = packed_product,
    .unpack_tile = unpack_tile,
    .rms_norm = rms_norm,
    .swiglu = swiglu,
    .geglu = geglu,
    .swiglu_clamped = swiglu_clamped,
};

}  // namespace narrows::kernels::ref
