// Bytes of workspace that FlashInfer's own host planner of paged prefill asks for. No kernel is run.
// stdin, per plan: heads kv_heads head_dim colocated_ctas requests, their query lengths, their KV
// lengths. stdout: float workspace bytes, int workspace bytes, padded batch size, split or not.
// The headers come from the flashinfer-python wheel; see flashinfer_workspace.py.
#include <flashinfer/attention/scheduler.cuh>

#include <cstdio>
#include <vector>

int main() {
  int heads, kv_heads, head_dim, requests;
  long long colocated;
  while (scanf("%d %d %d %lld %d", &heads, &kv_heads, &head_dim, &colocated, &requests) == 5) {
    std::vector<int32_t> query(requests + 1, 0), kv(requests + 1, 0);
    for (auto* offsets : {&query, &kv}) {
      for (int i = 0; i < requests; ++i) {
        int length;
        if (scanf("%d", &length) != 1) return 1;
        (*offsets)[i + 1] = (*offsets)[i] + length;
      }
    }
    size_t float_bytes = 0, int_bytes = 0;
    flashinfer::PrefillPlanInfo info;
    flashinfer::PrefillPlanImpl<false, int32_t>(
        float_bytes, int_bytes, nullptr, 0, nullptr, nullptr, 0, info, query.data(), kv.data(),
        query[requests], requests, heads, kv_heads, head_dim, head_dim, 1, false, 2, -1, -1, false,
        colocated, 0, nullptr, 2);
    printf("%zu %zu %lld %d\n", float_bytes, int_bytes, (long long)info.padded_batch_size,
           (int)info.split_kv);
    fflush(stdout);
  }
}
