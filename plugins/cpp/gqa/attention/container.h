// The kernels inside an engine: the `keys` and `cubins` fields, and the store that finds one layer's kernels in another's
// container. Format and reason: plugins/grouped_attention/fields.py.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "gqa/attention/cubin.h"

namespace gqa {

// One kernel that a layer launches: which, for which capability (89), and the sha256 of its whole .gqacubin file.
struct Key {
    std::string kernel;
    int capability;
    std::string sha256;
};

std::vector<Key> parse_keys(std::string_view data, std::string const& where = "plugin field keys");
std::string keys_text(std::vector<Key> const& keys);  // as they are: parse_keys of it gives them back

// sha256 -> file. Throws Error unless the container is whole and every file has its sha256.
std::map<std::string, std::string_view> unpack(std::string_view container,
                                               std::string const& where = "plugin field cubins");

// The kernels that this process has seen, by sha256. Filled layer by layer, asked at the first launch.
class CubinStore {
public:
    void add(std::string_view container);  // throws Error for a damaged one; then nothing of it is kept
    std::shared_ptr<Cubin const> get(std::string const& sha256) const;  // throws Error

    static CubinStore& of_process();

private:
    mutable std::mutex lock_;
    std::map<std::string, std::shared_ptr<Cubin const>> cubins_;
};

}  // namespace gqa
