"""What the implementations compute with. One op a file; the glossary below holds for all of them.

| here | is | in the GLA paper |
|---|---|---|
| `B T H K V` | batch, time, heads, key and value width of a head | batch, L, H, d'_k, d'_v |
| `C`, `N` | chunk length; number of chunks | C; N |
| `q k v o`, `g` | `[B, T, H, K or V]`; log forget gate, <= 0 | q k v o; log alpha |
| `P`, `X` | decay from a chunk's start through token i; from after token j to its end | Lambda; Gamma |
| `A` | scores in a chunk `[C, C]` | P (eq. 4) |
| `S` | state `[B, H, K, V]`, fp32 | S |

For Mamba and Mamba-2, after their papers: `x dt A B C D`, `E` channels of `N` states, and for Mamba-2
`H` heads of `P` channels and `N` states, where a chunk's length and count are `L` and `n`.
"""
