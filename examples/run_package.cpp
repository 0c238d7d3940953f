// Runs a language model that fp4compile.export wrote, without Python: prints the greedy next token.
//
//   python -c "import torch.utils.cpp_extension as e; print(*('-I' + p for p in e.include_paths()),
//       *('-L' + p + ' -Wl,-rpath,' + p for p in e.library_paths()))" > flags
//   g++ -std=c++20 -O1 examples/run_package.cpp $(cat flags) -ltorch -ltorch_cpu -lc10 -o run_package
//   ./run_package model.pt2 1 2 3
//
// A package is compiled for the CPU that exported it, with batches of at least 2 unless it was
// exported otherwise, so the prompt is given twice.

#include <cstdlib>
#include <iostream>
#include <vector>

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

int main(int argc, char** argv) {
  if (argc < 3) {
    std::cerr << "usage: run_package MODEL.pt2 TOKEN...\n";
    return 2;
  }
  std::vector<int64_t> ids;
  for (int i = 2; i < argc; ++i) {
    ids.push_back(std::atoll(argv[i]));
  }
  c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader program(argv[1]);
  auto prompt = at::tensor(ids, at::kLong).unsqueeze(0).repeat({2, 1});
  // [2, tokens, vocabulary]; the outputs come in the order of their names in Python.
  auto logits = program.run({prompt}).at(0);
  auto last = logits.select(0, 0).select(0, -1).to(at::kFloat);
  std::cout << last.argmax().item<int64_t>() << ' ' << last.max().item<float>() << '\n';
}
