#pragma once

#include <string>
#include <utility>
#include <vector>

namespace prunepath {

// Instruction sets that this processor has and the operating system lets a process use, by name, in
// a fixed order. The names of the architecture that the library was built for are always all there;
// other architectures' are not.
std::vector<std::pair<std::string, bool>> cpu_features();

}  // namespace prunepath
