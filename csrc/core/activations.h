#pragma once

// The activation functions of FFNs, in float32.

#include <cmath>
#include <cstdint>

#include "core/macros.h"

namespace prunepath {

enum class Activation : int32_t { kRelu, kGelu, kGeluTanh, kSilu, kRelu2 };

constexpr const char* kActivationNames[] = {"relu", "gelu", "gelu_tanh", "silu", "relu2"};

PRUNEPATH_HD float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kGelu:
      return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case Activation::kGeluTanh:
      return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case Activation::kSilu:
      return x / (1.0f + expf(-x));
    case Activation::kRelu2:
      return x > 0.0f ? x * x : (x != x ? x : 0.0f);
    default:
      return x > 0.0f ? x : (x != x ? x : 0.0f);
  }
}

// What a factored router applies in an activation's place; see ops/reference.py.
PRUNEPATH_HD float router_activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kGelu:
    case Activation::kGeluTanh:
      return x / (1.0f + expf(-1.702f * x));
    case Activation::kSilu:
      return x / (1.0f + expf(-x));
    default: {
      const float softplus = fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x)));
      return activation == Activation::kRelu2 ? softplus * softplus : softplus;
    }
  }
}

}  // namespace prunepath
