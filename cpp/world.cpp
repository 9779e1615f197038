// The RWKV World tokenizer: at each place of a text the longest entry of the vocabulary that fits (rwkv_bone/data/tokenizer.py).
//
// The entries are a tree of bytes in one array (a "double array"): the child of a node for a byte is at `base` ^ byte, if it is a
// child of that node. So a byte of text costs one read.
#include <cstddef>
#include <cstdint>
#include <vector>

namespace {

constexpr int32_t kFree = -1;

struct alignas(16) Node {  // never on two lines of the cache
    int32_t base = 0;
    int32_t parent = kFree;
    int32_t token = -1;  // of the entry that ends here
};

using Tree = std::vector<Node>;  // the root is at 0

template <class T>
int64_t encode(const Tree& tree, int64_t texts, const uint8_t* at, const int64_t* lengths, T* tokens, int64_t* counts) {
    T* out = tokens;
    for (int64_t i = 0; i < texts; i++) {
        T* const begin = out;
        for (const uint8_t* const end = at + lengths[i]; at < end; out++) {
            const uint8_t* longest = at + 1;  // every single byte is an entry
            int32_t node = 0;
            for (const uint8_t* to = at; to < end;) {
                const int32_t next = tree[std::size_t(node)].base ^ *to;
                if (tree[std::size_t(next)].parent != node) break;
                node = next, to++;
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
    struct Range { int32_t node; int64_t first, last, depth; };  // the entries that begin as a node does
    struct Child { uint8_t byte; int64_t first, last; };
    Tree& tree = *new Tree(256);
    std::vector<Range> ranges{{0, 0, n, 0}};
    std::vector<Child> children;
    tree[0].parent = kFree - 1;  // nobody's child, and taken
    std::size_t search[2] = {1, 1};  // where to begin: for one child at the first free place, for several where the last ones fitted
    const auto taken = [&](int32_t place) { return std::size_t(place) < tree.size() && tree[std::size_t(place)].parent != kFree; };
    const auto begin = [&](int64_t i) { return i ? ends[i - 1] : 0; };
    for (std::size_t i = 0; i < ranges.size(); i++) {
        auto [node, first, last, depth] = ranges[i];
        if (first < last && ends[first] - begin(first) == depth) tree[std::size_t(node)].token = tokens[first++];
        if (first == last) continue;
        children.clear();
        while (first < last) {
            const uint8_t byte = bytes[begin(first) + depth];
            int64_t next = first;
            while (next < last && bytes[begin(next) + depth] == byte) next++;
            children.push_back({byte, first, next});
            first = next;
        }
        std::size_t& place = search[children.size() > 1];
        int32_t base = 0;
        for (;; place++) {
            base = int32_t(place) ^ children[0].byte;
            bool fits = true;
            for (const Child& child : children) fits = fits && !taken(base ^ child.byte);
            if (fits) break;
        }
        if (tree.size() <= std::size_t(base | 255)) tree.resize(std::size_t(base | 255) + 1);
        tree[std::size_t(node)].base = base;
        for (const Child& child : children) {
            tree[std::size_t(base ^ child.byte)].parent = node;
            ranges.push_back({base ^ child.byte, child.first, child.last, depth + 1});
        }
    }
    return &tree;
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
