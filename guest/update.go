package guest

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/crivm/crivm/agentproto"
)

// UpdateContainer implements agentproto.AgentService.
func (a *Agent) UpdateContainer(ctx context.Context, r *agentproto.UpdateContainerRequest) (*agentproto.UpdateContainerResponse, error) {
	c, err := a.container(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	var res specs.LinuxResources
	if err := json.Unmarshal(r.GetResources(), &res); err != nil {
		return nil, fmt.Errorf("resources of container %s: %w: %w", c.id, err, errdefs.ErrInvalidArgument)
	}
	confineResources(&res)
	if a.machine != nil {
		dropAbsentHugepages(&res)
		limitReservations(&res)
	}
	c.op.Lock()
	defer c.op.Unlock()
	c.mu.Lock()
	state := c.state
	c.mu.Unlock()
	if state != agentproto.State_STATE_CREATED && state != agentproto.State_STATE_RUNNING || c.startErr != nil {
		return nil, fmt.Errorf("container %s is %s: %w", c.id, stateName(state), errdefs.ErrFailedPrecondition)
	}
	if err := a.Runtime.Update(ctx, c.id, &res); err != nil {
		return nil, fmt.Errorf("resources of container %s: %w", c.id, err)
	}
	return &agentproto.UpdateContainerResponse{}, nil
}
