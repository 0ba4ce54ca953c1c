package image

import (
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"encoding/binary"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/therootcompany/xz"
	"github.com/ulikunitz/xz/lzma"
)

// lz4LegacyMagic opens the only LZ4 framing that the kernel reads ("lz4 -l"): then blocks of up to
// 8 MiB of plain data, each with its compressed size before it.
const (
	lz4LegacyMagic = 0x184c2102
	lz4LegacyBlock = 8 << 20
	// maxLZMADictionary bounds what a header makes us allocate; the kernel's build uses 32 MiB.
	maxLZMADictionary = 64 << 20
)

// decompress tells the format by its magic number and returns the plain bytes, at most limit of them.
func decompress(data []byte, limit int) ([]byte, error) {
	starts := func(magic string) bool { return bytes.HasPrefix(data, []byte(magic)) }
	var r io.Reader
	var err error
	switch in := bytes.NewReader(data); {
	case starts("\x1f\x8b"):
		var z *gzip.Reader
		if z, err = gzip.NewReader(in); err == nil {
			z.Multistream(false)
			r = z
		}
	case starts("\xfd7zXZ\x00"):
		r, err = xz.NewReader(in, xz.DefaultDictMax)
	case starts("\x28\xb5\x2f\xfd"):
		var z *zstd.Decoder
		z, err = zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(uint64(limit)+1<<20))
		if err == nil {
			defer z.Close()
			r = z
		}
	case starts("BZh"):
		r = bzip2.NewReader(in)
	case starts("\x5d\x00\x00"):
		r, err = lzma.ReaderConfig{DictCap: maxLZMADictionary}.NewReader(in)
	case starts("\x02\x21\x4c\x18"):
		return decompressLZ4(data[4:], limit)
	default:
		return nil, fmt.Errorf("compression with magic number %x is not known (gzip, bzip2, lzma, xz, lz4, zstd are): %w",
			data[:min(4, len(data))], errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return nil, fmt.Errorf("decompress: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	plain, err := io.ReadAll(io.LimitReader(r, int64(limit)+1))
	if err != nil {
		return nil, fmt.Errorf("decompress: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if len(plain) > limit {
		return nil, fmt.Errorf("decompress: more than %d bytes: %w", limit, errdefs.ErrInvalidArgument)
	}
	return plain, nil
}

func decompressLZ4(data []byte, limit int) ([]byte, error) {
	var plain []byte
	block := make([]byte, lz4LegacyBlock)
	for len(data) > 0 {
		if len(data) < 4 {
			return nil, fmt.Errorf("decompress lz4: cut off in a block's size: %w", errdefs.ErrInvalidArgument)
		}
		size := binary.LittleEndian.Uint32(data)
		if uint64(size) > uint64(len(data)-4) {
			return nil, fmt.Errorf("decompress lz4: a block of %d bytes, but %d are left: %w", size, len(data)-4, errdefs.ErrInvalidArgument)
		}
		n, err := lz4.UncompressBlock(data[4:4+size], block)
		if err != nil {
			return nil, fmt.Errorf("decompress lz4: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		if n == 0 || len(plain)+n > limit {
			return nil, fmt.Errorf("decompress lz4: empty block or more than %d bytes: %w", limit, errdefs.ErrInvalidArgument)
		}
		plain = append(plain, block[:n]...)
		data = data[4+size:]
	}
	return plain, nil
}

// compress packs an initramfs in a way that the kernel's decompressors read. One thread and fixed
// levels, so that the same bytes come out each time.
func compress(how string, data []byte) ([]byte, error) {
	switch how {
	case "", "none":
		return data, nil
	case "lz4":
		out := binary.LittleEndian.AppendUint32(nil, lz4LegacyMagic)
		block := make([]byte, lz4.CompressBlockBound(lz4LegacyBlock))
		c := lz4.CompressorHC{Level: lz4.Level9}
		for len(data) > 0 {
			part := data[:min(len(data), lz4LegacyBlock)]
			n, err := c.CompressBlock(part, block)
			if err != nil {
				return nil, fmt.Errorf("compress lz4: %w", err)
			}
			out = binary.LittleEndian.AppendUint32(out, uint32(n))
			out = append(out, block[:n]...)
			data = data[len(part):]
		}
		return out, nil
	case "zstd":
		z, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedBestCompression),
			zstd.WithWindowSize(8<<20))
		if err != nil {
			return nil, fmt.Errorf("compress zstd: %w", err)
		}
		defer z.Close()
		return z.EncodeAll(data, nil), nil
	}
	return nil, fmt.Errorf("compression %q: %w", how, errdefs.ErrInvalidArgument)
}

// moduleSuffixes are the names by which a compressed module goes; see decompressModule.
var moduleSuffixes = []string{".ko", ".ko.gz", ".ko.xz", ".ko.zst"}

// moduleName gives the name by which modprobe knows a module file, "" when it is none.
func moduleName(file string) string {
	for _, suffix := range moduleSuffixes {
		if base, ok := strings.CutSuffix(file, suffix); ok {
			return strings.ReplaceAll(base, "-", "_")
		}
	}
	return ""
}
