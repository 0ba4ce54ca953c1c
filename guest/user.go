package guest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/user"

	"github.com/crivm/crivm/agentproto"
)

// maxAccountFile bounds /etc/passwd and /etc/group of an image.
const maxAccountFile = 4 << 20

// account is a resolved user and where it lives.
type account struct {
	agentproto.ResolvedUser
	home string
}

// resolveUser looks a user up in the /etc/passwd and /etc/group of a root file system. InvalidArgument for
// a name that is not there.
func resolveUser(root string, u *agentproto.User) (*account, error) {
	passwd, err := readAccounts(root, "/etc/passwd")
	if err != nil {
		return nil, err
	}
	group, err := readAccounts(root, "/etc/group")
	if err != nil {
		return nil, err
	}
	name := u.GetName()
	if u.GetHasUid() {
		name = strconv.FormatInt(u.GetUid(), 10)
	}
	if u.GetHasUid() && (u.GetUid() < 0 || u.GetUid() > maxID) || u.GetHasGid() && (u.GetGid() < 0 || u.GetGid() > maxID) {
		return nil, fmt.Errorf("uid %d, gid %d: %w", u.GetUid(), u.GetGid(), errdefs.ErrInvalidArgument)
	}
	if u.GetHasGid() {
		name, _, _ = strings.Cut(name, ":")
		name += ":" + strconv.FormatInt(u.GetGid(), 10)
	}
	found, err := user.GetExecUser(name, &user.ExecUser{Home: "/"}, bytes.NewReader(passwd), bytes.NewReader(group))
	if err != nil {
		return nil, fmt.Errorf("user %q: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	acc := &account{home: found.Home}
	acc.Uid, acc.Gid = uint32(found.Uid), uint32(found.Gid)
	// The primary group is listed too: without it a program could drop it and pass checks
	// that deny a group.
	groups := []uint32{acc.Gid}
	if !u.GetStrictGroups() {
		member, err := groupsOf(found.Uid, passwd, group)
		if err != nil {
			return nil, err
		}
		groups = append(groups, member...)
	}
	for _, g := range append(groups, u.GetSupplementalGroups()...) {
		if !slices.Contains(acc.Groups, g) {
			acc.Groups = append(acc.Groups, g)
		}
	}
	return acc, nil
}

// maxID is the largest uid and gid that user databases may hold.
const maxID = 1<<31 - 1

// groupsOf lists the groups of which /etc/group calls the user with this uid a member.
func groupsOf(uid int, passwd, group []byte) ([]uint32, error) {
	users, err := user.ParsePasswdFilter(bytes.NewReader(passwd), func(u user.User) bool { return u.Uid == uid })
	if err != nil {
		return nil, fmt.Errorf("/etc/passwd of the image: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if len(users) == 0 {
		return nil, nil
	}
	groups, err := user.ParseGroupFilter(bytes.NewReader(group), func(g user.Group) bool {
		return slices.Contains(g.List, users[0].Name)
	})
	if err != nil {
		return nil, fmt.Errorf("/etc/group of the image: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	ids := []uint32{}
	for _, g := range groups {
		if g.Gid >= 0 && g.Gid <= maxID {
			ids = append(ids, uint32(g.Gid))
		}
	}
	return ids, nil
}

// readAccounts reads a user database; an image without one has no names.
func readAccounts(root, path string) ([]byte, error) {
	b, err := readIn(root, path, maxAccountFile)
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%s of the image: %w", path, err)
	}
	return b, nil
}
