#include <array>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <string>
#include <utility>

namespace {

constexpr size_t MAX_ARGUMENTS = 64;  // as in lowering/replay.py
using Call = void (*)(void*, const int64_t*);

template <size_t>
using Number = int64_t;

// Pointers and integers are passed alike by every ABI that torch is built for.
template <size_t... Index>
constexpr Call caller(std::index_sequence<Index...>) {
    return [](void* kernel, const int64_t* numbers) {
        (void)numbers;  // of a kernel without arguments
        reinterpret_cast<void (*)(Number<Index>...)>(kernel)(numbers[Index]...);
    };
}

template <size_t... Count>
constexpr std::array<Call, sizeof...(Count)> callers(std::index_sequence<Count...>) {
    return {caller(std::make_index_sequence<Count>())...};
}

constexpr auto CALLERS = callers(std::make_index_sequence<MAX_ARGUMENTS + 1>());

}  // namespace

// Returns what a kernel threw, of an index out of bounds for example, or null.
extern "C" const char* replay(
    void* const* kernels, const int64_t* counts, const int64_t* numbers, int64_t calls) {
    thread_local std::string thrown;
    try {
        for (int64_t call = 0; call < calls; call++) {
            CALLERS[counts[call]](kernels[call], numbers);
            numbers += counts[call];
        }
    } catch (const std::exception& error) {
        thrown = error.what();
        return thrown.c_str();
    }
    return nullptr;
}
