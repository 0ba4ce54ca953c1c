package imageservice

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
)

// metadata are the lists that containers/storage keeps, below its root. One that a power cut has torn makes the whole
// store unusable, for good.
var metadata = []string{"*-images/images.json", "*-layers/layers.json", "*-layers/volatile-layers.json", "*-containers/containers.json", "*-containers/volatile-containers.json"}

// setAsideTorn renames lists that are no lists to <name>.damaged; true when there was one. The store then starts without
// what they held: images can be pulled again, and their disks are rebuilt.
func setAsideTorn(root string) (bool, error) {
	torn := false
	for _, pattern := range metadata {
		paths, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			return torn, err
		}
		for _, path := range paths {
			text, err := os.ReadFile(path)
			if err != nil {
				return torn, err
			}
			var list []struct {
				ID string `json:"id"`
			}
			err = json.Unmarshal(text, &list)
			for _, entry := range list {
				if entry.ID == "" {
					err = errors.Join(err, errors.New("an entry has no ID"))
				}
			}
			if err == nil {
				continue
			}
			slog.Error("a list of the image store is damaged and set aside; what it held is pulled again when it is needed", "path", path, "kept", path+".damaged", "error", err)
			if err := os.Rename(path, path+".damaged"); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return torn, fmt.Errorf("set aside: %w", err)
			}
			torn = true
		}
	}
	return torn, nil
}
