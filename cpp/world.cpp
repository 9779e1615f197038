// The RWKV World tokenizer: at each place of a text the longest entry of the vocabulary that fits (rwkv_bone/data/tokenizer.py).
//
// The entries are a tree of bytes. A node's children lie side by side in the order of their bytes, and a bit for each byte says which
// there are: a child is found by counting the bits before its own.
#include <cstddef>
#include <cstdint>
#include <vector>

namespace {

struct Node {
    uint64_t has[4] = {};
    int32_t first = 0;      // its children begin at
    int32_t token = -1;     // of the entry that ends here
    uint8_t before[4] = {};  // bits in the words of `has` before this one

    // 0, the root, where there is none.
    int64_t child(uint8_t byte) const {
        const uint64_t word = has[byte >> 6], bit = uint64_t(1) << (byte & 63);
        return word & bit ? first + before[byte >> 6] + __builtin_popcountll(word & (bit - 1)) : 0;
    }
};

using Tree = std::vector<Node>;

template <class T>
int64_t encode(const Tree& tree, int64_t texts, const uint8_t* at, const int64_t* lengths, T* tokens, int64_t* counts) {
    T* out = tokens;
    for (int64_t i = 0; i < texts; i++) {
        T* const begin = out;
        for (const uint8_t* const end = at + lengths[i]; at < end; out++) {
            const uint8_t* longest = at + 1;  // every single byte is an entry
            int64_t node = 0;
            for (const uint8_t* to = at; to < end && (node = tree[std::size_t(node)].child(*to));) {
                to++;
                if (tree[std::size_t(node)].token >= 0) *out = T(tree[std::size_t(node)].token), longest = to;
            }
            at = longest;
        }
        counts[i] = out - begin;
    }
    return out - tokens;
}

}  // namespace

extern "C" {

// Of n entries in the order of their bytes: `ends`, where each ends in `bytes`, and `tokens`, their ids.
void* world_open(int64_t n, const uint8_t* bytes, const int64_t* ends, const int32_t* tokens) {
    struct Range { int64_t first, last, depth; };  // the entries that begin as a node does
    std::vector<Range> ranges{{0, n, 0}};
    Tree* tree = new Tree(1);
    const auto begin = [&](int64_t i) { return i ? ends[i - 1] : 0; };
    for (std::size_t i = 0; i < tree->size(); i++) {
        auto [first, last, depth] = ranges[i];
        Node node = (*tree)[i];
        node.first = int32_t(tree->size());
        if (first < last && ends[first] - begin(first) == depth) node.token = tokens[first++];
        while (first < last) {
            const uint8_t byte = bytes[begin(first) + depth];
            int64_t next = first;
            while (next < last && bytes[begin(next) + depth] == byte) next++;
            node.has[byte >> 6] |= uint64_t(1) << (byte & 63);
            tree->emplace_back();
            ranges.push_back({first, next, depth + 1});
            first = next;
        }
        for (int word = 1; word < 4; word++) node.before[word] = uint8_t(node.before[word - 1] + __builtin_popcountll(node.has[word - 1]));
        (*tree)[i] = node;
    }
    return tree;
}

void world_close(void* tree) { delete static_cast<Tree*>(tree); }

// Texts that stand one after the other at `bytes`, each of so many bytes -> their tokens, one after the other, in an array with
// room for as many as there are bytes, uint16 or int32; how many each has; returns how many in all.
int64_t world_encode(const void* tree, int wide, int64_t texts, const uint8_t* bytes, const int64_t* lengths, void* tokens,
                     int64_t* counts) {
    const Tree& known = *static_cast<const Tree*>(tree);
    if (wide) return encode(known, texts, bytes, lengths, static_cast<int32_t*>(tokens), counts);
    return encode(known, texts, bytes, lengths, static_cast<uint16_t*>(tokens), counts);
}

}  // extern "C"
