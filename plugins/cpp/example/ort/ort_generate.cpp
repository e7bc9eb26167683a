// A bundle of target `ort` (growing cache) through ONNX Runtime's C++ interface, one batch, greedily. Numbers are fp32 or
// fp16, on a GPU bf16 too; the cache may be of codes (int8, or two codes of 4 bits to a byte): what a step gives goes into
// the next one as it is, so nothing here looks into it.
//
//   ort_generate BUNDLE NEW_TOKENS "3 1 4" "1 5"      token ids of a prompt each; prints the new ids, a line per prompt
//
// B rows, S new tokens (padded on the right), P columns of the past, K key/value heads of size D, V tokens.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <onnxruntime_cxx_api.h>

namespace {

using Ids = std::vector<std::int64_t>;
using Shape = std::vector<std::int64_t>;
constexpr std::size_t kOutside = 2;  // input_ids and attention_mask come before the pasts, logits before the presents

bool known(ONNXTensorElementDataType type) {
    return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ||
           type == ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 || type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 ||
           type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
}

// A past of no tokens: it has no bytes.
Ort::Value empty(Shape const& shape, ONNXTensorElementDataType type) {
    static Ort::MemoryInfo const memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    static std::int64_t nothing = 0;
    return Ort::Value::CreateTensor(memory, &nothing, 0, shape.data(), shape.size(), type);
}

// Bits of an fp16 or bf16 number as a whole number that is larger where the number is: no header's type is needed.
std::int32_t in_order(std::uint16_t bits) {
    std::int32_t const size = bits & 0x7fff;
    return bits & 0x8000 ? -size : size;
}

template <class Number, class Key>
std::int64_t largest(Number const* row, std::int64_t vocabulary, Key key) {
    auto const less = [key](Number one, Number other) { return key(one) < key(other); };
    return std::max_element(row, row + vocabulary, less) - row;
}

// The best id of a row of logits [V], `offset` elements into the tensor.
std::int64_t best_of(Ort::Value const& logits, std::int64_t offset, std::int64_t vocabulary) {
    auto const type = logits.GetTensorTypeAndShapeInfo().GetElementType();
    if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT)
        return largest(logits.GetTensorData<float>() + offset, vocabulary, [](float number) { return number; });
    if (type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 && type != ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16)
        throw std::runtime_error("logits are neither fp32, fp16 nor bf16");
    return largest(logits.GetTensorData<std::uint16_t>() + offset, vocabulary, in_order);
}

template <class T>
Ort::Value tensor(std::vector<T>& values, Shape const& shape) {
    static Ort::MemoryInfo const memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    return Ort::Value::CreateTensor<T>(memory, values.data(), values.size(), shape.data(), shape.size());
}

class Bundle {
public:
    explicit Bundle(std::string const& folder)
        : session_(environment_, (folder + "/model.onnx").c_str(), Ort::SessionOptions{}) {
        Ort::AllocatorWithDefaultOptions allocator;
        inputs_ = {"input_ids", "attention_mask"};
        outputs_ = {"logits"};
        for (std::size_t i = 0; i < session_.GetInputCount(); ++i) {
            std::string const name = session_.GetInputNameAllocated(i, allocator).get();
            if (name == "input_ids" || name == "attention_mask") continue;
            if (name.rfind("past_key_values.", 0) != 0) throw std::runtime_error("an input this example does not know: " + name);
            Ort::TypeInfo const kind = session_.GetInputTypeInfo(i);
            auto const info = kind.GetTensorTypeAndShapeInfo();
            if (!known(info.GetElementType()))
                throw std::runtime_error(name + " is of a type that a cache of `ort` does not have");
            types_.push_back(info.GetElementType());
            shapes_.push_back(info.GetShape());
            if (shapes_.back()[2] >= 0) throw std::runtime_error("a static cache: export with --cache growing");
            inputs_.push_back(name);
            outputs_.push_back("present." + name.substr(std::string("past_key_values.").size()));
        }
    }

    // A batch of empty rows: P is 0.
    void open(std::size_t rows) {
        lengths_.assign(rows, 0);
        past_.clear();
        for (std::size_t i = 0; i < shapes_.size(); ++i) {
            Shape shape = shapes_[i];
            shape[0] = static_cast<std::int64_t>(rows);
            shape[2] = 0;
            past_.push_back(empty(shape, types_[i]));
        }
        columns_ = 0;
    }

    // More tokens into every row, any number each; the best next token of each row.
    Ids step(std::vector<Ids> const& more) {
        std::size_t const rows = more.size();
        std::size_t sequence = 0;
        for (Ids const& row : more) sequence = std::max(sequence, row.size());
        std::size_t const width = columns_ + sequence;
        Ids ids(rows * sequence, 0), mask(rows * width, 0);
        for (std::size_t b = 0; b < rows; ++b) {
            std::copy(more[b].begin(), more[b].end(), ids.begin() + static_cast<std::ptrdiff_t>(b * sequence));
            auto const row = mask.begin() + static_cast<std::ptrdiff_t>(b * width);
            std::fill_n(row, lengths_[b], 1);                                                    // what the cache holds
            std::fill_n(row + static_cast<std::ptrdiff_t>(columns_), more[b].size(), 1);         // what is new
            lengths_[b] += more[b].size();
        }
        auto const size = [](std::size_t n) { return static_cast<std::int64_t>(n); };
        std::vector<Ort::Value> feed;
        feed.push_back(tensor(ids, {size(rows), size(sequence)}));
        feed.push_back(tensor(mask, {size(rows), size(width)}));
        for (Ort::Value& value : past_) feed.push_back(std::move(value));
        auto const names = [](std::vector<std::string> const& from) {
            std::vector<char const*> made;
            for (std::string const& name : from) made.push_back(name.c_str());
            return made;
        };
        auto const in = names(inputs_), out = names(outputs_);
        auto made = session_.Run(Ort::RunOptions{}, in.data(), feed.data(), feed.size(), out.data(), out.size());

        Shape const shape = made[0].GetTensorTypeAndShapeInfo().GetShape();  // [B, S, V]
        std::int64_t const vocabulary = shape[2];
        Ids best;
        for (std::size_t b = 0; b < rows; ++b) {
            std::size_t const last = b * static_cast<std::size_t>(shape[1]) + more[b].size() - 1;
            best.push_back(best_of(made[0], static_cast<std::int64_t>(last) * vocabulary, vocabulary));
        }
        past_.clear();
        for (std::size_t i = 1; i < made.size(); ++i) past_.push_back(std::move(made[i]));  // the next step's pasts
        columns_ = width;
        return best;
    }

private:
    Ort::Env environment_{ORT_LOGGING_LEVEL_WARNING, "ort_generate"};
    Ort::Session session_;
    std::vector<std::string> inputs_, outputs_;
    std::vector<Shape> shapes_;
    std::vector<ONNXTensorElementDataType> types_;
    std::vector<Ort::Value> past_;
    std::vector<std::size_t> lengths_;
    std::size_t columns_ = 0;
};

}  // namespace

int main(int count, char** words) try {
    if (count < 4) throw std::runtime_error("usage: ort_generate BUNDLE NEW_TOKENS \"3 1 4\" ...");
    std::vector<Ids> fed;
    for (int i = 3; i < count; ++i) {
        std::istringstream text(words[i]);
        fed.emplace_back();
        for (std::int64_t id; text >> id;) fed.back().push_back(id);
        if (fed.back().empty()) throw std::runtime_error("a prompt without token ids");
    }
    Bundle bundle(words[1]);
    bundle.open(fed.size());
    std::vector<Ids> answers(fed.size());
    for (int done = 0; done < std::stoi(words[2]); ++done) {
        Ids const best = bundle.step(fed);
        for (std::size_t b = 0; b < best.size(); ++b) {
            answers[b].push_back(best[b]);
            fed[b] = {best[b]};
        }
    }
    for (Ids const& answer : answers) {
        for (std::int64_t id : answer) std::printf("%lld ", static_cast<long long>(id));
        std::printf("\n");
    }
    return 0;
} catch (std::exception const& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
}
