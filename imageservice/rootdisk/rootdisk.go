// Package rootdisk turns the layers of an image into one read-only EROFS disk, without mounting
// anything and without a tool of the host's.
//
// Layers are read as the tar streams they are defined by, uppermost first. So every file is known to be
// visible or hidden when its data comes by, visible data goes straight to its place on the disk, and the
// whole image is read and written once. The directory tree stays in memory and is written after the data.
//
// What a layer means is taken from the OCI image specification (layer.md): later entries replace earlier
// ones, ".wh.name" hides name in the layers below, ".wh..wh..opq" hides all that the layers below have in
// a directory. A hard link must point into its own layer, as with overlayfs. Like the overlay driver of
// containers/storage, a character device 0:0 counts as a whiteout. Extended attributes named
// trusted.overlay.* and user.overlay.* are dropped, since a guest mounts the disk as an overlayfs layer
// and would obey them.
//
// The same layers give the same bytes, on every machine: nothing but the layers and the UUID goes in.
package rootdisk

import (
	"context"
	"fmt"
	"io"
	"os"
)

// BlockSize is the block size of every disk, in bytes.
const BlockSize = 4096

// Limits on what an image may ask for. Beyond them Build fails.
const (
	treeBytes   = 1 << 30  // memory for the tree: about two million files
	maxNameLen  = 255      // bytes in one path component: NAME_MAX
	maxPathLen  = 4095     // bytes in a path or symbolic link target: PATH_MAX without its NUL
	inlineBytes = 32 << 20 // memory for ends of files that are stored beside their inode
)

// A Layer opens the uncompressed tar stream of one layer. It may be called twice; both streams must be
// the same. At most one stream is open at a time.
type Layer func() (io.ReadCloser, error)

// Build writes the disk of an image to f, which must be empty and open for writing. Layers are ordered
// lowest first, as in a manifest. The caller fsyncs.
func Build(ctx context.Context, f *os.File, uuid [16]byte, layers []Layer) error {
	out := newDataWriter(f)
	m := &merger{ctx: ctx, out: out, root: newDir(), memory: account{treeBytes}}
	for i := len(layers) - 1; i >= 0; i-- {
		if err := m.addLayer(layers[i]); err != nil {
			return fmt.Errorf("layer %d of %d: %w", i+1, len(layers), err)
		}
	}
	return writeTree(ctx, out, m.root, uuid)
}
