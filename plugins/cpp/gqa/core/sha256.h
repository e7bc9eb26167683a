// SHA-256 (FIPS 180-4), for the hashes that manifests and kernel files carry.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace gqa {

class Sha256 {
public:
    void update(std::string_view bytes);
    std::string hex_digest();  // ends the message: call it once

private:
    void compress(unsigned char const* block);

    std::array<std::uint32_t, 8> state_{0x6a09e667u, 0xbb67ae85u, 0x3c6ef372u, 0xa54ff53au,
                                        0x510e527fu, 0x9b05688cu, 0x1f83d9abu, 0x5be0cd19u};
    std::array<unsigned char, 64> block_{};
    std::uint64_t length_ = 0;  // bytes so far
};

std::string sha256_hex(std::string_view bytes);
std::string sha256_of_file(std::string const& path);  // throws Error for a file that cannot be read

}  // namespace gqa
