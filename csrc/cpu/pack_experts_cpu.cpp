#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "cpu/tensors.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace prunepath {
namespace {

// A new table [D, H] in large pages, where the system gives them on request: with small ones,
// streams of weights wait for address translation. It is no more than a hint, so that a refusal is
// no error.
Tensor new_table(int64_t D, int64_t H, ScalarType dtype) {
  Tensor table = new_tensor({D, H}, dtype);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t data = reinterpret_cast<uintptr_t>(table.const_data_ptr());
  const uintptr_t begin = (data + page - 1) / page * page;
  const uintptr_t end =
      (data + static_cast<uintptr_t>(table.numel()) * table.element_size()) / page * page;
  if (begin < end) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return table;
}

// to[j, h] = from[order[j], h] for `to` [D, H] contiguous and `from` of any strides, which count
// elements.
template <typename Word>
void copy_rows(const Word* from, int64_t row_stride, int64_t column_stride, const int64_t* order,
               int64_t D, int64_t H, Word* to) {
  // Squares, so that both sides stay in cache where `from` is transposed.
  constexpr int64_t kSide = 64;
  torch::stable::parallel_for(0, (D + kSide - 1) / kSide, 1, [&](int64_t first, int64_t last) {
    for (int64_t j0 = first * kSide; j0 < std::min(last * kSide, D); j0 += kSide) {
      const int64_t j1 = std::min(j0 + kSide, D);
      const Word* rows[kSide];
      for (int64_t j = j0; j < j1; ++j) {
        rows[j - j0] = from + (order == nullptr ? j : order[j]) * row_stride;
      }
      if (column_stride == 1) {
        for (int64_t j = j0; j < j1; ++j) {
          std::memcpy(to + j * H, rows[j - j0], static_cast<size_t>(H) * sizeof(Word));
        }
        continue;
      }
      for (int64_t h0 = 0; h0 < H; h0 += kSide) {
        const int64_t h1 = std::min(h0 + kSide, H);
        for (int64_t j = j0; j < j1; ++j) {
          for (int64_t h = h0; h < h1; ++h) {
            to[j * H + h] = rows[j - j0][h * column_stride];
          }
        }
      }
    }
  });
}

// The table of `from` [D, H], which has the given strides.
Tensor make_table(const Tensor& from, int64_t row_stride, int64_t column_stride,
                  const int64_t* order, int64_t D, int64_t H) {
  Tensor table = new_table(D, H, from.scalar_type());
  const auto copy = [&](auto* type) {
    using Word = std::remove_cvref_t<decltype(*type)>;
    copy_rows(static_cast<const Word*>(from.const_data_ptr()), row_stride, column_stride, order, D,
              H, static_cast<Word*>(table.mutable_data_ptr()));
  };
  if (from.element_size() == 2) {
    copy(static_cast<uint16_t*>(nullptr));
  } else {
    copy(static_cast<uint32_t*>(nullptr));
  }
  return table;
}

void check_permutation(const int64_t* order, int64_t D) {
  std::vector<bool> seen(static_cast<size_t>(D));
  for (int64_t j = 0; j < D; ++j) {
    if (order[j] < 0 || order[j] >= D) {
      fail("pack_experts", "expected order to hold numbers from 0 to ", D - 1, ", got ", order[j]);
    }
    if (seen[static_cast<size_t>(order[j])]) {
      fail("pack_experts", "expected order to be a permutation, got ", order[j], " twice");
    }
    seen[static_cast<size_t>(order[j])] = true;
  }
}

std::vector<Tensor> pack_experts(const std::optional<Tensor>& gate, const Tensor& up,
                                 const Tensor& down, const std::optional<Tensor>& order) {
  check_pack_experts(gate, up, down, order);
  const int64_t D = up.size(0);
  const int64_t H = up.size(1);
  const int64_t* ids = nullptr;
  if (order.has_value()) {
    ids = static_cast<const int64_t*>(order->const_data_ptr());
    check_permutation(ids, D);
  }
  std::vector<Tensor> tables;
  if (gate.has_value()) {
    tables.push_back(make_table(*gate, gate->stride(0), gate->stride(1), ids, D, H));
  }
  tables.push_back(make_table(up, up.stride(0), up.stride(1), ids, D, H));
  tables.push_back(make_table(down, down.stride(1), down.stride(0), ids, D, H));
  return tables;
}

}  // namespace
}  // namespace prunepath

STABLE_TORCH_LIBRARY_IMPL(prunepath, CPU, m) {
  m.impl("pack_experts", TORCH_BOX(&prunepath::pack_experts));
}
