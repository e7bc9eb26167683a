#include "gqa/plugin/layer_fields.h"

#include <cstring>
#include <map>
#include <string_view>
#include <utility>

#include "gqa/core/error.h"

namespace gqa::plugin {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

PluginFieldType type_of(CreationField const& field) {
    return field.integer ? PluginFieldType::kINT32 : PluginFieldType::kFLOAT32;
}

// The fields by name; whatever is taken out is known, what is left at the end is not.
class Reader {
public:
    Reader(nvinfer1::PluginFieldCollection const& fields, char const* fix) : fix_(fix) {
        for (int i = 0; i < fields.nbFields; ++i) left_[fields.fields[i].name] = fields.fields[i];
    }

    Layer layer(std::int32_t version) {
        Layer layer;
        layer.version = version;
        for (CreationField const& field : creation_of(version)) {
            if (field.integer) {
                layer.*field.integer = integer(field.name);
            } else {
                layer.*field.real = value<float>(field.name, PluginFieldType::kFLOAT32);
            }
        }
        return layer;
    }

    std::int32_t integer(char const* name) {
        auto const found = left_.find(name);
        if (found != left_.end() && found->second.type == PluginFieldType::kINT64) {
            return static_cast<std::int32_t>(value<std::int64_t>(name, PluginFieldType::kINT64));
        }
        return value<std::int32_t>(name, PluginFieldType::kINT32);
    }

    std::string_view text(char const* name) {
        PluginField const field = take(name);
        return {static_cast<char const*>(field.data), static_cast<std::size_t>(field.length)};
    }

    bool has(char const* name) const { return left_.count(name) != 0; }
    void drop(char const* name) { left_.erase(name); }

    void expect_nothing_else() const {
        std::string names;
        for (auto const& [name, field] : left_) names += (names.empty() ? "" : ", ") + name;
        if (!names.empty()) throw Error("the attention layer lacks or does not know: " + names, "plugin fields", fix_);
    }

private:
    PluginField take(char const* name) {
        auto const found = left_.find(name);
        if (found == left_.end()) {
            throw Error(std::string("the attention layer lacks or does not know: ") + name, "plugin fields", fix_);
        }
        PluginField const field = found->second;
        left_.erase(found);
        return field;
    }

    template <typename Value>
    Value value(char const* name, PluginFieldType type) {
        PluginField const field = take(name);
        if (field.type != type || field.length != 1 || !field.data) {
            throw Error(std::string("plugin field ") + name + " is not one number of its type", "plugin fields", fix_);
        }
        Value read;
        std::memcpy(&read, field.data, sizeof read);
        return read;
    }

    std::map<std::string, PluginField> left_;
    char const* fix_;
};

}  // namespace

Layer read_attributes(nvinfer1::PluginFieldCollection const& fields, std::int32_t version) {
    Reader reader(fields, "export the bundle again with this version: `gqa-export onnx --target trt-plugin`");
    reader.drop("plugin_version");  // the node's identity, by which TensorRT found this creator
    reader.drop("plugin_namespace");
    Layer const layer = reader.layer(version);
    reader.expect_nothing_else();
    check_layer(layer);
    return layer;
}

Serialized read_serialized(nvinfer1::PluginFieldCollection const& fields, std::int32_t version) {
    Reader reader(fields, "build the engine again with `gqa-export trt`");
    check_contract_version(reader.integer(kContractVersionField), version);  // first: another version has other fields
    Serialized read;
    read.layer = reader.layer(version);
    read.keys = parse_keys(reader.text(kKeysField));
    if (reader.has(kCubinsField)) read.container = reader.text(kCubinsField);
    reader.expect_nothing_else();
    check_layer(read.layer);
    return read;
}

std::vector<PluginField> creation_fields(std::int32_t version) {
    std::vector<PluginField> fields;
    for (CreationField const& field : creation_of(version)) fields.emplace_back(field.name, nullptr, type_of(field), 1);
    return fields;
}

nvinfer1::PluginFieldCollection const* FieldsToSerialize::describe(Layer const& layer, std::vector<Key> const& keys,
                                                                   std::string container) {
    layer_ = layer;
    keys_ = keys_text(keys);
    container_ = std::move(container);
    fields_.clear();
    for (CreationField const& field : creation_of(layer_.version)) {
        void const* const data = field.integer ? static_cast<void const*>(&(layer_.*field.integer))
                                               : static_cast<void const*>(&(layer_.*field.real));
        fields_.emplace_back(field.name, data, type_of(field), 1);
    }
    auto const length = [](std::string const& text) { return static_cast<std::int32_t>(text.size()); };
    contract_ = contract_of(layer_.version);
    fields_.emplace_back(kContractVersionField, &contract_, PluginFieldType::kINT32, 1);
    fields_.emplace_back(kKeysField, keys_.data(), PluginFieldType::kCHAR, length(keys_));
    if (!container_.empty()) {
        fields_.emplace_back(kCubinsField, container_.data(), PluginFieldType::kCHAR, length(container_));
    }
    collection_ = {static_cast<std::int32_t>(fields_.size()), fields_.data()};
    return &collection_;
}

}  // namespace gqa::plugin
