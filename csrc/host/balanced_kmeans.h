// Balanced k-means: clusters that all hold exactly the same number of points.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace prunepath {

struct BalancedKMeansOptions {
  int max_iterations = 50;
  uint64_t seed = 0;
  int num_threads = 0;  // 0: as many as the machine has
  // Called with (done, total) after every iteration, from the calling thread. What it throws stops
  // the clustering and reaches the caller.
  std::function<void(int, int)> progress;
};

// Returns the cluster of each of points [num_points, num_features] (row-major, finite): every label
// of 0..num_clusters-1 exactly num_points / num_clusters times. The result depends on the points
// and the seed, not on the number of threads. Throws std::invalid_argument on bad input.
std::vector<int32_t> balanced_kmeans(const float* points, int64_t num_points, int64_t num_features,
                                     int64_t num_clusters, const BalancedKMeansOptions& options);

// The objective: the sum of squared distances of the points to the means of their clusters.
double within_cluster_sum_of_squares(const float* points, int64_t num_points, int64_t num_features,
                                     const std::vector<int32_t>& labels, int64_t num_clusters);

}  // namespace prunepath

void bind_balanced_kmeans(pybind11::module_& module);
